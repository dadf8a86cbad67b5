"""See the package."""

roi_align = deform_conv2d = None
