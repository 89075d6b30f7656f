#!/usr/bin/env bash
# The paper's run, in order, on a cluster with 8 A100s that share $STORE (NFS, or a mount with rename, append and locks).
#
#     export MLFLOW_TRACKING_URI=http://HEAD:5000 RAY_API_SERVER_ADDRESS=http://HEAD:8265
#     STORE=/nfs/rlfseg DATA=/nfs/phrasecut jobs/paper.sh
#
# PhraseCut itself is not downloaded for you: docs/data.md says where it is and how its folder, $DATA, must look.
set -euo pipefail
# SAM's checkpoint: https://github.com/facebookresearch/segment-anything#model-checkpoints
STORE=${STORE:?a folder that every node sees, with sam_vit_h_4b8939.pth in it}
DATA=${DATA:?the folder of refer_train.json, image_data_split.json and images/}
# Without it each job would record into a file of its own, which goes when the job does
export MLFLOW_TRACKING_URI=${MLFLOW_TRACKING_URI:?an MLflow server that every node reaches, such as http://HEAD:5000}
submit() { rlfseg submit -- "$@" || [ $? = 3 ]; } # 3: done, and what had to be refused is named
C=jobs/configs/paper

# 1. Every image and mask decoded and checked once; damaged ones are named and left out.
for split in train val test; do
    submit prepare --source phrasecut --path "$DATA" --splits "[$split]" --on_error skip --workers 8 --out "$STORE/$split"
done
# 2. Labels are fixed, so SAM refines them once, not in the training loop: 4.3 masks share an embedding.
submit refine --config $C/refine.yaml --sam.checkpoint "$STORE/sam_vit_h_4b8939.pth" --samples "$STORE/train" \
    --out "$STORE/refined"
# 3. The autoencoder is frozen and its mode is deterministic, so latents are encoded once for all epochs.
submit encode --config $C/encode.yaml --samples "$STORE/refined" --out "$STORE/latents"
# 4. LoRA 64, AdamW 1e-4, 8 x 8 phrases a step, 10 epochs, 512 x 512, seed 42 (Table 8).
submit train --config $C/train.yaml --latents "$STORE/latents" --val_samples "$STORE/val" --out "$STORE/rlfseg"
# 5. The paper gives neither eps nor a threshold: both are chosen on the validation split, never on the test split.
submit calibrate --adapter "$STORE/rlfseg/adapter" --samples "$STORE/val" --device cuda --run.workers 8 --run.loaders 8 \
    --out "$STORE/calibration"
# 6. Table 5: without and with AOS.
for way in none aos; do
    submit evaluate --adapter "$STORE/rlfseg/adapter" --samples "$STORE/test" --sampling.rescale $way \
        --protocol rlfseg,clipseg,phrasecut --device cuda --run.workers 8 --run.loaders 24 --out "$STORE/test-$way"
done
