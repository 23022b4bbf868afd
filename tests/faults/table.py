"""The table of faults."""

from __future__ import annotations

from faults import arguments, closures, losses, models, saving, transforms, wrapping

MODULES = (closures, losses, arguments, models, transforms, saving, wrapping)
KINDS = [kind for module in MODULES for kind in module.KINDS]
