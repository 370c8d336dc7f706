"""What the paper does not describe."""
