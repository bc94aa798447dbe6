"""The components of titan_moe inside a stock, pip-installed torchtitan 0.3: see docs/torchtitan.md.

Importing this package changes nothing, imports no torchtitan, and everything is off until `enable` turns it on.
"""

from torchtitan_patches.recipes import enable

__all__ = ["enable"]
