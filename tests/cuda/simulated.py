"""An accelerator for machines that have none: the device "simulated".

It finds tensors on the wrong device, and counts how often the host waits for a number. It is built
from `simulated.cpp` by the C++ compiler, once for each version of torch and of the file.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SOURCE = Path(__file__).with_name("simulated.cpp")
NAME = "simulated"
LIMIT = 600
"""Seconds after which the compiler has hung."""


def built() -> Path:
    """The library, which is compiled if it is not there."""
    from torch.utils import cpp_extension  # it needs setuptools, which GPU machines may not have

    kind = f"{torch.__version__} {sysconfig.get_config_var('EXT_SUFFIX')}"
    digest = hashlib.sha256(SOURCE.read_bytes() + kind.encode()).hexdigest()[:16]
    library = Path(__file__).parents[2] / "build" / f"simulated-{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(exist_ok=True)
    torch_libraries = Path(torch.__file__).parent / "lib"
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run(
            [
                *(os.environ.get("CXX", "c++"), "-O1", "-w", "-shared", "-fPIC", "-std=c++20"),
                *(f"-I{include}" for include in includes),
                *(str(SOURCE), "-o", str(made)),
                *(f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"),
                *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"),
            ],
            check=True,
            timeout=LIMIT,
        )
        made.replace(library)
    return library


def start() -> Any:
    """Make the device known to torch; returns the library, whose `reads()` counts waits."""
    loader = importlib.machinery.ExtensionFileLoader("simulated_device", str(built()))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    library: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module.set_device = module.synchronize = lambda device=None: None
    module.device = lambda index=0: nullcontext()
    module.manual_seed = module.manual_seed_all = library.manual_seed
    module.get_rng_state = lambda device=NAME: library.get_rng_state()
    module.set_rng_state = lambda state, device=NAME: library.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return library
