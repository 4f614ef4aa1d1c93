"""One attention layer's cache on a device: `DeviceLayer`."""
