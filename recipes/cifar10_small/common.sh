# Sourced by the recipes for CIFAR-10 with the small encoder: the flags that its jobs share, and the encoder they use.
# To choose settings without the test images, keep such runs apart, and pass --val_fraction 0.1:
#     OUT=output/choice RESULTS=output/choice recipes/cifar10_small/finetune.sh --val_fraction 0.1 ...
. "$(dirname "$0")/../common.sh"
common=(--data_path "$data" --input_size 32 --num_workers 1 --seed $seed --resume auto)
classify=("${common[@]}" --nb_classes 10 --crop_pct 1 --save_freq 100 --keep 1 --model vit_demo_patch4)
encoder=${ENCODER:-weights/mae_vit_demo_patch4_cifar10/model.safetensors}

# Augmentation and schedule of the rows in which all layers are trained.
train=(--crop_scale 0.6 1.0 --aa none --reprob 0 --smoothing 0.1 --drop_path 0 --batch_size 128 --warmup_epochs 5)
all_labels=("${train[@]}" --epochs 30 --eval_freq 5)
few_labels=("${train[@]}" --train_fraction 0.1 --epochs 100 --eval_freq 10)

# The same of the probes, whose encoder is frozen.
frozen=(--crop_scale 0.6 1.0 --batch_size 250 --epochs 20 --warmup_epochs 2 --eval_freq 5)
