"""What a run of lora.yaml has learned, as PEFT keeps it: python save_adapter.py runs/prose adapter."""

from __future__ import annotations

import sys

from net import llama, with_lora

import dtrain

run, folder = sys.argv[1:]
model = with_lora(llama(width=64, depth=2), r=8)
dtrain.load_weights(model, run)
model.save_pretrained(folder)  # PeftModel.from_pretrained(base, folder) reads it
