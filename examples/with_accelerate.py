"""Accelerate runs your own loop; `accelerate launch` runs the same file on many devices,
in autocast on a GPU."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import residual_kernels as rk
from residual_kernels.demo import digit_images

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
torch.manual_seed(0)
model, preprocess, tokenizer = rk.load_bundled()
pictures, labels = digit_images()
images = torch.stack([preprocess(picture) for picture in pictures])
train = DataLoader(TensorDataset(images[:400], labels[:400]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=256)

bases = rk.fit_bases(model.visual, train, kinds=("head", "mlp"))
head = rk.ZeroShotHead.from_text(model, tokenizer, NAMES, ["the number {}", "a handwritten {}"])
residual = rk.ResiDual(model.visual, bases, rest="all")
optimizer = torch.optim.AdamW(residual.trainable(), lr=0.3)
residual, optimizer, train, val = accelerator.prepare(residual, optimizer, train, val)
head = head.to(accelerator.device)


@torch.no_grad()
def accuracy() -> float:
    residual.eval()
    right = [accelerator.gather_for_metrics(head(residual(x)).argmax(1) == y) for x, y in val]
    return torch.cat(right).float().mean().item()


before = accuracy()  # of the untouched model: in the anchored form, weights of 1 are the model
for _ in range(3):
    residual.train()
    for x, y in train:
        loss = cross_entropy(head(residual(x)), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
after = accuracy()

kept = accelerator.unwrap_model(residual)
accelerator.print(f"accuracy {before:.4f} -> {after:.4f} with {len(kept.weight)} learned numbers")
if accelerator.is_main_process:
    rk.save_adapter(kept, "digits-adapter")
