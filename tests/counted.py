"""A memory for the number of a model's operations, which takes half a second of every run, though few models differ."""

import models_mae
import models_vit
from util.report import flops, log

_known: dict[tuple, float] = {}


def count_flops(model, mask_ratio=None):
    """Count the operations of a training step, once for all models that are built and trained alike."""
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    key = (type(model), repr(model), repr(model.config), trained, mask_ratio)
    if key not in _known:
        _known[key] = flops.count_flops(model, mask_ratio)
    return _known[key]


def remember_small_models() -> None:
    """Count the models of runs.FLAGS, for processes that are forked from this one."""
    size = {"img_size": 28, "patch_size": 7, "in_chans": 3}
    count_flops(models_mae.mae_vit_demo_patch4(**size, norm_pix_loss=False), 0.75)
    count_flops(models_vit.vit_demo_patch4(**size, num_classes=10, global_pool=True, drop_path_rate=0.1))
    count_flops(models_vit.make_linear_probe(models_vit.vit_demo_patch4(**size, num_classes=10, global_pool=False)))


log.count_flops = count_flops
