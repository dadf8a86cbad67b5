"""See torchvision."""


class InterpolationMode:
    """Its names."""

    BICUBIC = BILINEAR = NEAREST = LANCZOS = None
