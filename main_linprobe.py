"""Linear probing: a linear classifier on the frozen encoder (paper, appendix A.1), and evaluation.

The paper's ViT-B, 8 GPUs (effective batch 16384):
    torchrun --nproc_per_node 8 main_linprobe.py --data_path DIR --batch_size 512 --accum_iter 4 --cls_token \
        --model vit_base_patch16 --finetune mae_pretrain_vit_base.pth --epochs 90 --blr 0.1 --weight_decay 0.0 \
        --dist_eval
Without --finetune an untrained encoder is probed, for comparison. Several learning rates in one pass over the trunk,
a head each, every one as it would end alone:
    python main_linprobe.py ... --blr 0.05 0.1 0.2
With --probe attentive a learned query pools the patch tokens; it is trained with AdamW.

output_dir/ as in main_finetune.py.
"""

import argparse

import models_vit
from engine_finetune import evaluate, head_losses, train_one_epoch
from util import amp, errors, misc, optim, options, speed
from util.checkpoint import weights
from util.data import loaders
from util.data.transforms import CentreCrop, Crop
from util.distributed import dist
from util.loop import run_epochs
from util.lr_sched import CosineSchedule
from util.report.log import RunLog


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The job's flags, from argv or the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        "MAE linear probing",
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
    add("--probe", default="linear", choices=("linear", "attentive"), help="attentive: a learned query pools")
    args = options.finish(parser.parse_args(argv))
    if args.blr is None:
        args.blr = 0.1 if args.probe == "linear" else 1e-3
    return args


def main(argv: list[str] | None = None) -> None:
    """Probe or evaluate as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    options.check(args, models_vit.MODELS)
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_timeout)
    options.take_output_dir(args)

    pixels = options.pixels(args)
    augmentation = Crop(args.input_size, args.crop_scale, one_draw=True)
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
    source = misc.find(args.resume, args.output_dir, "linprobe", args.model)
    model = models_vit.MODELS[args.model](
        **options.model_size(args), num_classes=args.nb_classes, global_pool=args.global_pool
    )
    if args.finetune and not source:
        weights.load_pretrained(args.finetune, model, vars(args))
    names = [f"blr{blr:g}" for blr in args.blr] if isinstance(args.blr, list) else None
    rates = args.blr if isinstance(args.blr, list) else [args.blr]
    model = models_vit.make_linear_probe(model, len(rates), args.probe == "attentive").to(device)
    scaler = amp.LossScaler(args.amp, device)
    if args.eval:
        weights.load_for_eval(source, model, vars(args), val_loader.dataset.class_to_idx)
        speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
        evaluate(model, val_loader, device, scaler, args.dist_eval, names=names, confusion=args.confusion)
        return

    lrs = [optim.actual_lr(args.lr, blr, args.batch_size, args.accum_iter) for blr in rates]
    optimizer = optim.probe_optimizer(model, lrs, args.weight_decay)
    schedule = CosineSchedule(lrs[0], args.min_lr, args.warmup_epochs, args.epochs)
    checkpoints = misc.Checkpoints(
        args.output_dir, "linprobe", model, optimizer, scaler, vars(args), val_loader.dataset.class_to_idx
    )
    position = checkpoints.resume(source, args.start_epoch, args.resume_override, len(train_loader.dataset))
    checkpoints.prepare(source)
    speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
    model = dist.wrap(model, device, static=args.accum_iter == 1)

    log = RunLog(args.output_dir, args.log_dir, position.epoch, position.images / train_loader.sampler.images_per_epoch)
    log.summary(
        args.model,
        model,
        train_loader.dataset,
        train_loader.dataset.images.root,
        args.batch_size * args.accum_iter * dist.world_size(),
        lrs[0],
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
            head_losses,
            train_loader,
            optimizer,
            device,
            epoch,
            scaler,
            schedule,
            accum_iter=args.accum_iter,
            clip_grad=args.clip_grad,
            run=run,
        ),
        evaluate=lambda poll: evaluate(model, val_loader, device, scaler, args.dist_eval, poll, names, args.confusion),
        eval_freq=args.eval_freq,
    )


if __name__ == "__main__":
    errors.run(main)
