"""The one loop: compiled steps of many chains on a mesh of devices, from a plan to a finished run."""
