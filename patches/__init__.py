"""What the plugin changes in a host at run time: one function a patch, guarded by a check of what the host can do."""
