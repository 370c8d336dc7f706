"""Weights trained elsewhere for the classifier: torchvision's from ImageNet, or a file."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models import ResNet50_Weights

from models import ResNet50
from support.files import reading


def load(model: nn.Module, weights: str) -> None:
    """Put `weights` ("imagenet" or a file) into the model, but for its head, which stays new.

    Raises ValueError when they cannot be had or do not fit.
    """
    if weights == "imagenet" and not isinstance(model, ResNet50):
        raise ValueError(
            f"--weights imagenet: found a {type(model).__name__}; the ImageNet weights fit "
            "ResNet-50 (presets paper, cbis) only; give --weights none or a file"
        )
    if weights == "imagenet":
        try:
            source = ResNet50_Weights.IMAGENET1K_V1
            state = source.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"--weights imagenet: the weights could not be loaded ({error}); "
                "give --weights FILE (torchvision's ResNet-50 weights) or --weights none"
            ) from None
    else:
        with reading(Path(weights), "give another file"):
            state = torch.load(weights, map_location="cpu", weights_only=True)
            state = state.get("model", state)
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    with reading(Path(weights), "give the weights of a torchvision ResNet of this size"):
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) != {"fc.weight", "fc.bias"}:
            raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
