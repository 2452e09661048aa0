"""Masked pre-training (He et al., arXiv 2111.06377).

One process:
    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --norm_pix_loss
The paper's ViT-L, on 8 nodes of 8 GPUs (effective batch 4096), on every node:
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 main_pretrain.py \
        --data_path DIR --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 \
        --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05

output_dir/
    checkpoint-{epoch}.pth      every --save_freq epochs and at the end (what is in it: util/misc.py)
    log.txt                     a JSON line per epoch
    events.out.tfevents.*       TensorBoard
"""

import argparse

import models_mae
from engine_pretrain import train_one_epoch
from util import amp, datasets, dist, errors, misc, optim, options
from util.augment import weak_transform
from util.log import RunLog
from util.loop import run_epochs
from util.lr_sched import CosineSchedule


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The job's flags, from argv or the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        "MAE pre-training", models_mae.MODELS, model="mae_vit_large_patch16", batch_size=64, epochs=400,
        warmup_epochs=40, weight_decay=0.05, blr=1e-3, min_lr=0.0, crop_scale=(0.2, 1.0), save_freq=20,
    )  # fmt: skip
    add = parser.add_argument_group("masking").add_argument
    add("--mask_ratio", default=0.75, type=float, help="share of the patches that are removed")
    add("--norm_pix_loss", action="store_true", help="predict patches normalised by their own mean and variance")
    return options.finish(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> None:
    """Pre-train as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    options.check(args, models_mae.MODELS)
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_on_itp)

    transform = weak_transform(args.input_size, args.crop_scale)
    train_set = datasets.image_folder(args.data_path, "train", transform)
    loader = datasets.train_loader(train_set, args.batch_size, args.num_workers, args.pin_mem, args.seed)

    model = models_mae.MODELS[args.model](**options.model_size(args), norm_pix_loss=args.norm_pix_loss).to(device)
    lr = optim.actual_lr(args.lr, args.blr, args.batch_size, args.accum_iter)
    optimizer = optim.pretrain_optimizer(model, lr, args.weight_decay)
    schedule = CosineSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    scaler = amp.LossScaler(args.amp, device)
    start_epoch = misc.resume(args.resume, model, optimizer, scaler, args.start_epoch)
    model = dist.wrap(model, device)

    log = RunLog(args.output_dir, args.log_dir)
    log.summary(args.model, model, len(train_set), device, scaler.amp)
    run_epochs(
        loader,
        range(start_epoch, args.epochs),
        args.save_freq,
        log,
        train=lambda epoch: train_one_epoch(
            model, loader, optimizer, device, epoch, scaler, schedule,
            mask_ratio=args.mask_ratio, accum_iter=args.accum_iter, clip_grad=args.clip_grad, log=log,
        ),
        save=lambda epoch: misc.save_checkpoint(args.output_dir, epoch, model, optimizer, scaler, vars(args)),
    )  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
