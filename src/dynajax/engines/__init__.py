"""Where environments run: beside the device, or on it."""
