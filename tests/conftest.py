"""Shared set-up: timm imports torchvision, whose operators must be declared beside a CPU build of torch."""

import importlib.util

if importlib.util.find_spec("torch") is not None:
    from vlexport.frontends.compat import declare_torchvision_operators

    declare_torchvision_operators()
