"""What check_gpu.py tries on a device: `right` computes what it should, `fast` is as quick as the device allows."""
