"""What a model would take and give on a device, before anything is downloaded or bought."""
