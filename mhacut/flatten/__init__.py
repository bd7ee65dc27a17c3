"""FLatten Transformers (Han et al., ICCV 2023, arXiv 2308.00442) as models of timm.

``timm.create_model("flatten_swin_tiny_224")`` and ``timm.list_models("flatten_*")`` work once both timm and
mhacut are imported, in any order; importing this package registers them. There is one file per family, over
one shared attention in :mod:`mhacut.flatten.attention`. Outputs agree with the official models to rounding;
parameters have the official names, or timm's where timm has the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from mhacut.flatten import flatten_cswin, flatten_deit, flatten_pvt, flatten_pvt_v2, flatten_swin
from mhacut.flatten.family import encoded_img_size

FAMILIES = (flatten_cswin, flatten_deit, flatten_pvt, flatten_pvt_v2, flatten_swin)
"""Names of the modules with FLatten models, which ``timm.list_models(module="flatten_swin")`` accepts."""


def checkpoint_filter(
    model: nn.Module,
) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """Return the function that translates official state dicts for ``model``; None for other models."""
    filters = {family.__name__: family.checkpoint_filter_fn for family in FAMILIES}
    return filters.get(type(model).__module__)


def img_size_of(architecture: str, shapes: Mapping[str, tuple[int, ...]], patch_size: int = 4) -> int | None:
    """Return the image size of a FLatten checkpoint; None if it is the default of ``architecture``."""
    pyramids = [family for family in FAMILIES if family is not flatten_deit]
    config = next((f.default_cfgs[architecture] for f in pyramids if architecture in f.default_cfgs), None)
    size = encoded_img_size(shapes, patch_size)
    return size if config is not None and size not in config.default.input_size[1:] else None
