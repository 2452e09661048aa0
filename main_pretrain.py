r"""Masked pre-training (He et al., arXiv 2111.06377).

One process:
    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --norm_pix_loss
The paper's ViT-L, on 8 nodes of 8 GPUs (effective batch 4096), on every node:
    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 main_pretrain.py \
        --data_path DIR --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 \
        --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05
Go on from released weights, encoder and decoder, on images of one's own:
    python main_pretrain.py --data_path DIR --model mae_vit_base_patch16 --norm_pix_loss --epochs 50 \
        --init mae_pretrain_vit_base_full.pth

output_dir/
    checkpoint-{epoch}.pth      every --save_freq epochs and at the end (what is in it: util/misc.py)
    checkpoint-last.pth         the newest state, also within an epoch; --resume auto continues from it
    log.txt                     a JSON line per epoch
    reconstructions/            a picture every --monitor_freq epochs (more: util/report/monitor.py)
    events.out.tfevents.*       TensorBoard
"""

import argparse
from functools import partial

import models_mae
from engine_pretrain import train_one_epoch
from util import checks, errors, masking, misc, optim, options, speed
from util.amp import LossScaler
from util.checkpoint import weights
from util.data import loaders
from util.data.transforms import CentreCrop, Crop
from util.distributed import dist
from util.loop import Run
from util.lr_sched import CosineSchedule
from util.report.monitor import FixedMasks, Monitor
from util.updater import Updater


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the job's flags from argv, or from the command line; --help lists them with their defaults."""
    parser = options.common_parser(
        __doc__,
        models_mae.MODELS,
        model="mae_vit_large_patch16",
        batch_size=64,
        epochs=400,
        warmup_epochs=40,
        weight_decay=0.05,
        blr=1e-3,
        min_lr=0.0,
        crop_scale=(0.2, 1.0),
        save_freq=20,
        keep=None,
    )
    add = parser.add_argument_group("masking").add_argument
    add("--mask_ratio", default=0.75, type=float, metavar="SHARE", help="share of the patches that are masked")
    sampling_help = "which patches are masked: random ones, blocks of them, or all but a grid"
    add("--mask_sampling", default="random", choices=masking.KINDS, help=sampling_help)
    add("--norm_pix_loss", action="store_true", help="predict patches normalised by their own mean and variance")
    init_help = "start from this checkpoint's encoder, and its decoder if it has one; ignored if --resume finds a run"
    add("--init", default="", metavar="FILE_OR_URL", help=init_help)
    add = parser.add_argument_group("decoder").add_argument
    add("--decoder_dim", type=int, metavar="WIDTH", help="width of the decoder; default: the model's")
    add("--decoder_depth", type=int, metavar="BLOCKS", help="number of decoder blocks; default: the model's")
    add("--decoder_heads", type=int, metavar="HEADS", help="attention heads of the decoder; default: the model's")
    add = parser.add_argument_group("monitoring").add_argument
    monitor_help = "epochs between monitoring on val/: reconstructions, loss, k-NN accuracy; 0: never"
    add("--monitor_freq", default=10, type=int, metavar="EPOCHS", help=monitor_help)
    return options.finish(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> None:
    """Pre-train as the flags say (argv defaults to the command line's)."""
    args = get_args(argv)
    checks.check(args, models_mae.MODELS)

    # Join the other processes, which need the same flags, and lock output_dir, so that no second run writes to it.
    device = dist.init(args.device, args.seed, args.dist_url, args.dist_timeout)
    checks.check_together(args)

    # Data.
    data, pixels, loading = options.data(args), options.pixels(args), options.loading(args, device)
    loader = loaders.train_loader(data, Crop(args.input_size, args.crop_scale), pixels, loading, classes_optional=True)

    # Model. A run that is resumed does not start from --init.
    source = misc.resolve_resume(args.resume, args.output_dir, "pretrain", args.model)
    model = models_mae.MODELS[args.model](**options.model_size(args), norm_pix_loss=args.norm_pix_loss)
    if args.init and not source:
        weights.load_initial(args.init, model, vars(args))
    model = model.to(device)

    # Optimizer.
    lr = optim.actual_lr(args.lr, args.blr, args.batch_size, args.accum_iter)
    optimizer = optim.pretrain_optimizer(model, lr, args.weight_decay, args.shard)
    schedule = CosineSchedule(lr, args.min_lr, args.warmup_epochs, args.epochs)
    scaler = LossScaler(args.amp, device)

    # Resume, or start afresh.
    checkpoints = misc.Checkpoints(args.output_dir, "pretrain", model, optimizer, scaler, vars(args))
    run = Run.start(checkpoints, loader, source, options.run_settings(args, eval_freq=args.monitor_freq), [lr])

    # Compile the blocks, in the precision of the run that is resumed, and wrap the model in DDP.
    speed.prepare(model, device, scaler.amp, args.attention, args.compile, args.grad_checkpoint)
    model = dist.wrap(model, device, static_graph=args.accum_iter == 1)
    updater = Updater(model, optimizer, schedule, scaler, accum_iter=args.accum_iter, clip_grad=args.clip_grad)

    # Monitoring every few epochs: reconstructions, loss and k-NN accuracy on val/.
    evaluate = None
    if args.monitor_freq:
        val, train = loaders.monitor_loaders(data, loader.dataset.images, CentreCrop(args.input_size), loading)
        masks = FixedMasks(args.mask_ratio, args.mask_sampling, args.seed)
        monitor = Monitor(val, train, args.output_dir, run.log, scaler, masks)
        evaluate = partial(monitor, model)

    # Epochs.
    run.fit(
        train=lambda epoch: train_one_epoch(
            model, loader, updater, epoch, mask_ratio=args.mask_ratio, mask_sampling=args.mask_sampling, run=run
        ),
        evaluate=evaluate,
    )


if __name__ == "__main__":
    errors.run(main)
