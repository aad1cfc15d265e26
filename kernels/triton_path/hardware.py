"""What the rules ask about the device that a tensor lies on."""

import torch


def arch_of(device: torch.device) -> int:
    """Return the compute capability as one number, 90 for 9.0; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors_of(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
