"""Fine-tuning of a pre-trained encoder as a classifier (paper, appendix A.1), and evaluation.

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

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import amp, errors, misc, optim, options, speed
from util.checkpoint import weights
from util.data import loaders
from util.data.transforms import CentreCrop, FinetuneTransform
from util.distributed import dist
from util.loop import run_epochs
from util.lr_sched import CosineSchedule
from util.report.log import RunLog


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The job's flags, from argv or the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        "MAE fine-tuning",
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
    add("--drop_path", default=0.1, type=float, help="stochastic depth")
    add("--trainable_blocks", type=float, metavar="N", help="train the last N only; 0.5: the last MLP; default: all")
    add("--model_ema", action="store_true", help="keep a running average of the weights; test_ema_*, or with --eval it")
    add("--model_ema_decay", default=0.9999, type=float, help="its memory: how much of it stays at an update")
    add("--layer_decay", default=0.75, type=float, help="learning rate's factor per layer below the head")
    add("--color_jitter", type=float, help="used only without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's augmentation policy; none: off")
    add("--smoothing", default=0.1, type=float, help="label smoothing")
    add("--reprob", default=0.25, type=float, help="random erasing: probability")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="random erasing: filling")
    add("--recount", default=1, type=int, help="random erasing: areas")
    add("--resplit", action="store_true", help="accepted; acts on split batches only, which we don't make")
    add("--mixup", default=0.0, type=float, help="mixup's alpha; 0: off")
    add("--cutmix", default=0.0, type=float, help="cutmix's alpha; 0: off")
    add("--cutmix_minmax", type=float, nargs="+", help="bounds of cutmix's area; replaces alpha")
    add("--mixup_prob", default=1.0, type=float, help="probability of mixup or cutmix")
    add("--mixup_switch_prob", default=0.5, type=float, help="probability of cutmix where both are on")
    add("--mixup_mode", default="batch", choices=("batch", "pair", "elem"), help="what is mixed with what")
    return options.finish(parser.parse_args(argv))


def mixing(args: argparse.Namespace) -> tuple[Mixup | None, nn.Module]:
    """Mixup or cutmix, if any, and the loss that goes with it."""
    if options.mixes(args):
        mixup = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()


def running_average(model: nn.Module, decay: float, updates: int) -> ModelEmaV3:
    """Of the model's weights. Says where a run of so many updates is too short for it."""
    if (start := decay**updates) > 0.01:
        dist.say(
            f"warning: {start:.0%} of the running average is still the untrained start after all {updates} "
            f"updates: pass --model_ema_decay {max(0.0, 1 - 10 / updates):.4g}"
        )
    return ModelEmaV3(model, decay)


def evaluate_both(model: nn.Module, ema: ModelEmaV3 | None, *common, **more) -> dict[str, float]:
    """evaluate() of the model, and where a running average is kept of that, too, as ema_*."""
    stats = evaluate(model, *common, **more)
    averaged = evaluate(ema.module, *common) if ema else {}
    return stats | {f"ema_{name}": value for name, value in averaged.items()}


def main(argv: list[str] | None = None) -> None:
    """Fine-tune or evaluate as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    options.check(args, models_vit.MODELS)
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_timeout)
    options.take_output_dir(args)

    pixels = options.pixels(args)
    augmentation = FinetuneTransform(
        args.input_size, args.crop_scale, args.color_jitter, args.aa, args.reprob, args.remode, args.recount, pixels
    )
    train_loader, val_loader = loaders.classifier_loaders(
        args.data_path,
        args.nb_classes,
        None if args.eval else augmentation,
        CentreCrop(args.input_size, args.crop_pct),
        args.batch_size,
        args.num_workers,
        args.pin_mem,
        args.seed,
        args.dist_eval,
        pixels,
        device,
        args.train_fraction,
    )
    source = misc.find(args.resume, args.output_dir, "finetune", args.model)
    model = models_vit.MODELS[args.model](
        **options.model_size(args),
        num_classes=args.nb_classes,
        global_pool=args.global_pool,
        drop_path_rate=args.drop_path,
    )
    if args.finetune and not source:
        weights.load_pretrained(args.finetune, model, vars(args))
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
    model.to(device)
    scaler = amp.LossScaler(args.amp, device)
    if args.eval:
        weights.load_for_eval(source, model, vars(args), val_loader.dataset.class_to_idx)
        speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
        evaluate(model, val_loader, device, scaler, args.dist_eval, confusion=args.confusion)
        return

    if args.trainable_blocks is not None:
        models_vit.train_last(model, args.trainable_blocks)
    lr = optim.actual_lr(args.lr, args.blr, args.batch_size, args.accum_iter)
    optimizer = optim.finetune_optimizer(model, lr, args.weight_decay, args.layer_decay, args.shard)
    schedule = CosineSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    mixup_fn, criterion = mixing(args)
    updates = args.epochs * -(-len(train_loader) // args.accum_iter)
    ema = running_average(model, args.model_ema_decay, updates) if args.model_ema else None
    checkpoints = misc.Checkpoints(
        args.output_dir,
        "finetune",
        model,
        optimizer,
        scaler,
        vars(args),
        val_loader.dataset.class_to_idx,
        ema.module if ema else None,
    )
    position = checkpoints.resume(source, args.start_epoch, args.resume_override, len(train_loader.dataset))
    checkpoints.prepare(source)
    if ema:
        dist.share(ema.module.state_dict().values())  # as DDP does with the model
    speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
    model = dist.wrap(model, device, static=args.accum_iter == 1)

    log = RunLog(args.output_dir, args.log_dir, position.epoch, position.images / train_loader.sampler.images_per_epoch)
    log.summary(
        args.model,
        model,
        train_loader.dataset,
        train_loader.dataset.images.root,
        args.batch_size * args.accum_iter * dist.world_size(),
        lr,
        device,
        scaler.amp,
    )
    run_epochs(
        train_loader,
        args.epochs,
        checkpoints,
        log,
        position,
        device,
        save_freq=args.save_freq,
        save_minutes=args.save_minutes,
        max_bad_steps=args.max_bad_steps,
        max_bad_images=args.max_bad_images,
        train=lambda epoch, run: train_one_epoch(
            model,
            criterion,
            train_loader,
            optimizer,
            device,
            epoch,
            scaler,
            schedule,
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            mixup_fn=mixup_fn,
            run=run,
            on_update=(lambda: ema.update(dist.unwrap(model))) if ema else None,
        ),
        evaluate=lambda poll: evaluate_both(
            model, ema, val_loader, device, scaler, args.dist_eval, poll, confusion=args.confusion
        ),
        eval_freq=args.eval_freq,
    )


if __name__ == "__main__":
    errors.run(main)
