"""What a measurement was made on."""

import os
import platform

import torch

import gradkit


def describe_machine() -> dict[str, str]:
    """Processor, cores, threads and versions, for a results file."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "gradkit": gradkit.__version__,
    }
