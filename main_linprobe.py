r"""Linear probing: a linear classifier on the frozen encoder (paper, appendix A.1), and evaluation.

The paper's ViT-B, 8 GPUs (effective batch 16384):
    torchrun --nproc_per_node 8 main_linprobe.py --data_path DIR --batch_size 512 --accum_iter 4 --cls_token \
        --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth --epochs 90 --blr 0.1 --weight_decay 0.0 \
        --dist_eval
Without --finetune an untrained encoder is probed, for comparison. Several learning rates can be tried in one run: each
trains a head of its own on the same features, with the same result as in a run of its own, unless one diverges, which
stops them all:
    python main_linprobe.py ... --blr 0.05 0.1 0.2
With --probe attentive a learned query pools the patch tokens; it is trained with AdamW.

output_dir/ as in main_finetune.py.
"""

import argparse
from functools import partial

import torch
from torch import nn

import models_vit
from engine_finetune import evaluate, head_losses, train_one_epoch
from util import checks, errors, misc, optim, options, speed
from util.amp import LossScaler
from util.checkpoint import weights
from util.data import loaders
from util.data.loaders import DeviceLoader, TrainLoader
from util.data.transforms import CentreCrop, Crop
from util.distributed import dist
from util.loop import Run
from util.lr_sched import CosineSchedule
from util.updater import Updater


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the job's flags from argv, or from the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        __doc__,
        models_vit.MODELS,
        model="vit_large_patch16",
        batch_size=512,
        epochs=90,
        warmup_epochs=10,
        weight_decay=0.0,
        blr=None,
        min_lr=0.0,
        crop_scale=(0.08, 1.0),
        save_freq=1,
        keep=3,
        several_rates=True,
    )
    options.add_classifier_flags(parser, global_pool=False)
    add = parser.add_argument_group("probe").add_argument
    probe_help = "linear: a linear classifier; attentive: a learned query pools the patch tokens for it"
    add("--probe", default="linear", choices=("linear", "attentive"), help=probe_help)
    args = options.finish(parser.parse_args(argv))
    if args.blr is None:
        args.blr = 0.1 if args.probe == "linear" else 1e-3
    return args


def open_data(args: argparse.Namespace, device: torch.device) -> tuple[TrainLoader | None, DeviceLoader]:
    """Open train/ (None with --eval) and val/."""
    return loaders.classifier_loaders(
        options.data(args),
        args.nb_classes,
        None if args.eval else Crop(args.input_size, args.crop_scale, one_draw=True),
        CentreCrop(args.input_size, args.crop_pct),
        options.pixels(args),
        options.loading(args, device),
        fraction=args.train_fraction,
        distributed_eval=args.dist_eval,
    )


def build_model(args: argparse.Namespace, rates: list[float], pretrained: bool) -> nn.Module:
    """Build the probe, with a head per learning rate; pretrained: on the encoder that --finetune names."""
    model = models_vit.MODELS[args.model](
        **options.model_size(args), num_classes=args.nb_classes, global_pool=args.global_pool
    )
    if pretrained:
        weights.load_pretrained(args.finetune, model, vars(args))
    return models_vit.make_linear_probe(model, len(rates), args.probe == "attentive")


def main(argv: list[str] | None = None) -> None:
    """Probe or evaluate as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    checks.check(args, models_vit.MODELS)

    # Join the other processes, which need the same flags, and lock output_dir, so that no second run writes to it.
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_timeout)
    checks.check_together(args)

    # Data and model, with a head for each of several learning rates. A run that is resumed has its encoder already.
    train_loader, val_loader = open_data(args, device)
    classes = val_loader.dataset.class_to_idx
    source = misc.resolve_resume(args.resume, args.output_dir, "linprobe", args.model)
    rates = args.blr if isinstance(args.blr, list) else [args.blr]
    settings = options.evaluation(args, [models_vit.head_name(blr) for blr in rates] if len(rates) > 1 else None)
    model = build_model(args, rates, pretrained=options.starts_pretrained(args, source)).to(device)
    scaler = LossScaler(args.amp, device)

    # With --eval: evaluate the checkpoint, and stop.
    if args.eval:
        numbers = weights.load_for_eval(source, model, vars(args), list(classes), options.given_class_names(args))
        models_vit.select_classes(model, numbers)
        speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
        evaluate(model, val_loader, device, scaler, settings)
        return

    # Optimizer and loss.
    criterion = partial(head_losses, class_weights=train_loader.class_weights(args.class_weights))
    lrs = [optim.actual_lr(args.lr, blr, args.batch_size, args.accum_iter) for blr in rates]
    optimizer = optim.probe_optimizer(model, lrs, args.weight_decay)
    schedule = CosineSchedule(lrs[0], args.min_lr, args.warmup_epochs, args.epochs)

    # Resume, or start afresh.
    checkpoints = misc.Checkpoints(args.output_dir, "linprobe", model, optimizer, scaler, vars(args), classes)
    run = Run.start(checkpoints, train_loader, source, options.run_settings(args, eval_freq=args.eval_freq), lrs)

    # Compile the blocks, in the precision of the run that is resumed, and wrap the model in DDP.
    speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
    model = dist.wrap(model, device, static_graph=args.accum_iter == 1)
    updater = Updater(model, optimizer, schedule, scaler, accum_iter=args.accum_iter, clip_grad=args.clip_grad)

    # Epochs.
    run.fit(
        train=lambda epoch: train_one_epoch(model, criterion, train_loader, updater, epoch, run=run),
        evaluate=lambda _, poll: evaluate(model, val_loader, device, scaler, settings, poll),
    )


if __name__ == "__main__":
    errors.run(main)
