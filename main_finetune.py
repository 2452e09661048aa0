r"""Fine-tuning of a pre-trained encoder as a classifier (paper, appendix A.1), and evaluation.

One process, own images:
    python main_finetune.py --data_path DIR --nb_classes N --model vit_base_patch16 \
        --finetune mae_pretrain_vit_base.pth
The paper's ViT-B, one node of 8 GPUs (effective batch 1024):
    torchrun --nproc_per_node 8 main_finetune.py --data_path DIR --batch_size 32 --accum_iter 4 \
        --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth --epochs 100 --blr 5e-4 --layer_decay 0.65 \
        --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval
Evaluate a fine-tuned checkpoint:
    python main_finetune.py --eval --resume FILE --model vit_base_patch16 --batch_size 16 --data_path DIR
Without --finetune the same training starts from scratch.

output_dir/ as in main_pretrain.py, with a checkpoint per epoch, of which the newest --keep and the best stay.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import models_vit
from engine_finetune import evaluate, train_one_epoch, weighted_cross_entropy
from util import checks, errors, misc, optim, options, speed
from util.amp import LossScaler
from util.checkpoint import weights
from util.data import loaders
from util.data.loaders import DeviceLoader, TrainLoader
from util.data.transforms import CentreCrop, FinetuneTransform
from util.distributed import dist
from util.loop import Run, Stats
from util.lr_sched import CosineSchedule
from util.report.scores import Evaluation
from util.updater import Updater, updates_per_epoch


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the job's flags from argv, or from the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        __doc__,
        models_vit.MODELS,
        model="vit_large_patch16",
        batch_size=64,
        epochs=50,
        warmup_epochs=5,
        weight_decay=0.05,
        blr=1e-3,
        min_lr=1e-6,
        crop_scale=(0.08, 1.0),
        save_freq=1,
        keep=3,
    )
    options.add_classifier_flags(parser, global_pool=True)
    add = parser.add_argument_group("regularisation").add_argument
    add("--drop_path", default=0.1, type=float, metavar="RATE", help="stochastic depth: rate of the last block")
    blocks_help = "partial fine-tuning: train the head and the last N blocks; 0.5: the last MLP; default: all blocks"
    add("--trainable_blocks", type=float, metavar="N", help=blocks_help)
    ema_help = "keep an EMA of the weights and log its accuracy as test_ema_*; with --eval: evaluate the EMA"
    add("--model_ema", action="store_true", help=ema_help)
    add("--model_ema_decay", default=0.9999, type=float, metavar="DECAY", help="EMA decay per update")
    add("--layer_decay", default=0.75, type=float, help="factor on the learning rate per layer below the head")
    add("--smoothing", default=0.1, type=float, help="label smoothing")
    _add_augmentation_flags(parser)
    return options.finish(parser.parse_args(argv))


def _add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--color_jitter", type=float, metavar="STRENGTH", help="strength of colour jitter, used only with --aa none")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's automatic augmentation; none: off")
    add("--reprob", default=0.25, type=float, metavar="P", help="random erasing: probability per image")
    remode_help = "random erasing: filled with zeros, one random colour, or a random colour per pixel"
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help=remode_help)
    add("--recount", default=1, type=int, metavar="N", help="random erasing: largest number of areas per image")
    add(
        "--resplit",
        action="store_true",
        help="accepted, without effect: it concerns split batches, of which none are made",
    )
    add("--mixup", default=0.0, type=float, metavar="ALPHA", help="alpha of mixup; 0: off")
    add("--cutmix", default=0.0, type=float, metavar="ALPHA", help="alpha of cutmix; 0: off")
    bounds_help = "cutmix with boxes whose sides are MIN to MAX of the image's side; replaces alpha"
    add("--cutmix_minmax", type=float, nargs="+", metavar=("MIN", "MAX"), help=bounds_help)
    add("--mixup_prob", default=1.0, type=float, metavar="P", help="probability that mixup or cutmix is applied")
    switch_help = "probability of cutmix rather than mixup where both are on"
    add("--mixup_switch_prob", default=0.5, type=float, metavar="P", help=switch_help)
    mode_help = "draw the mixing ratio per batch, per pair of images, or per image"
    add("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help=mode_help)


def build_mixup_and_loss(
    args: argparse.Namespace, class_weights: Tensor | None
) -> tuple[Mixup | None, Callable[[Tensor, Tensor], Tensor]]:
    """Return timm's Mixup (None if disabled) and the loss of (logits, targets), in which classes may have weights."""
    mixup = None
    if options.mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=0.0,
            num_classes=args.nb_classes,
        )

    # Smooth in the loss, not in Mixup: targets that Mixup has smoothed would spread the class weights over all classes.
    return mixup, partial(weighted_cross_entropy, class_weights=class_weights, smoothing=args.smoothing)


def build_ema(model: nn.Module, decay: float, updates: int) -> ModelEmaV3:
    """Create an EMA of the weights; warn if the run has too few updates for this decay."""
    if (start := decay**updates) > 0.01:
        dist.print_rank0(
            f"warning: {start:.0%} of the EMA is still the first weights after all {updates} updates: pass "
            f"--model_ema_decay {max(0.0, 1 - 10 / updates):.4g}"
        )
    return ModelEmaV3(model, decay)


def evaluate_both(
    model: nn.Module,
    ema: ModelEmaV3 | None,
    loader: DeviceLoader,
    scaler: LossScaler,
    settings: Evaluation,
    poll: Callable[[], None],
) -> Stats:
    """Evaluate the model and, if there is one, its EMA, whose figures are named ema_*.

    See engine_finetune.evaluate for the other arguments, and what it raises.
    """
    stats = evaluate(model, loader, loader.device, scaler, settings, poll)
    if not ema:
        return stats
    dist.print_rank0("the EMA of the weights:")
    averaged = evaluate(ema.module, loader, loader.device, scaler, replace(settings, confusion=""), poll)
    return stats | {f"ema_{name}": value for name, value in averaged.items()}


def open_data(args: argparse.Namespace, device: torch.device) -> tuple[TrainLoader | None, DeviceLoader]:
    """Open train/ (None with --eval) and val/."""
    pixels = options.pixels(args)
    augmentation = FinetuneTransform(
        args.input_size,
        args.crop_scale,
        args.color_jitter,
        args.aa,
        args.reprob,
        args.remode,
        args.recount,
        pixels,
    )
    return loaders.classifier_loaders(
        options.data(args),
        args.nb_classes,
        None if args.eval else augmentation,
        CentreCrop(args.input_size, args.crop_pct),
        pixels,
        options.loading(args, device),
        fraction=args.train_fraction,
        distributed_eval=args.dist_eval,
    )


def build_model(args: argparse.Namespace, pretrained: bool) -> nn.Module:
    """Build the classifier; with --trainable_blocks all but its head and last blocks is frozen.

    Args:
        args: Flags of the job.
        pretrained: Start from the encoder that --finetune names, with a new head.
    """
    model = models_vit.MODELS[args.model](
        **options.model_size(args),
        num_classes=args.nb_classes,
        global_pool=args.global_pool,
        drop_path_rate=args.drop_path,
    )
    if pretrained:
        weights.load_pretrained(args.finetune, model, vars(args))
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    if args.trainable_blocks is not None:
        models_vit.freeze_all_but_last(model, args.trainable_blocks)
    return model


def main(argv: list[str] | None = None) -> None:
    """Fine-tune or evaluate as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    checks.check(args, models_vit.MODELS)

    # Join the other processes, which need the same flags, and lock output_dir, so that no second run writes to it.
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_timeout)
    checks.check_together(args)

    # Data and model. A run that is resumed has its encoder already.
    train_loader, val_loader = open_data(args, device)
    classes, settings = val_loader.dataset.class_to_idx, options.evaluation(args)
    source = misc.resolve_resume(args.resume, args.output_dir, "finetune", args.model)
    model = build_model(args, pretrained=options.starts_pretrained(args, source)).to(device)
    scaler = LossScaler(args.amp, device)

    # With --eval: evaluate the checkpoint, and stop.
    if args.eval:
        numbers = weights.load_for_eval(source, model, vars(args), list(classes), options.given_class_names(args))
        models_vit.select_classes(model, numbers)
        speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
        evaluate(model, val_loader, device, scaler, settings)
        return

    # Optimizer and loss.
    lr = optim.actual_lr(args.lr, args.blr, args.batch_size, args.accum_iter)
    optimizer = optim.finetune_optimizer(model, lr, args.weight_decay, args.layer_decay, args.shard)
    schedule = CosineSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    mixup_fn, criterion = build_mixup_and_loss(args, train_loader.class_weights(args.class_weights))
    updates = args.epochs * updates_per_epoch(len(train_loader), args.accum_iter)
    ema = build_ema(model, args.model_ema_decay, updates) if args.model_ema else None

    # Resume, or start afresh.
    checkpoints = misc.Checkpoints(
        args.output_dir, "finetune", model, optimizer, scaler, vars(args), classes, ema.module if ema else None
    )
    run = Run.start(checkpoints, train_loader, source, options.run_settings(args, eval_freq=args.eval_freq), [lr])
    if ema:
        dist.broadcast_from_rank0(ema.module.state_dict().values())  # as DDP does with the model

    # Compile the blocks, in the precision of the run that is resumed, and wrap the model in DDP.
    speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
    model = dist.wrap(model, device, static_graph=args.accum_iter == 1)
    updater = Updater(model, optimizer, schedule, scaler, accum_iter=args.accum_iter, clip_grad=args.clip_grad, ema=ema)

    # Epochs.
    run.fit(
        train=lambda epoch: train_one_epoch(model, criterion, train_loader, updater, epoch, mixup_fn=mixup_fn, run=run),
        evaluate=lambda _, poll: evaluate_both(model, ema, val_loader, scaler, settings, poll),
    )


if __name__ == "__main__":
    errors.run(main)
