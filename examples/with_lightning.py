"""Lightning trains ResiDual's weights; the bundled CLIP's image tower stays frozen inside it."""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import residual_kernels as rk
from residual_kernels.demo import digit_images

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class LitClassifier(lightning.LightningModule):
    def __init__(self, residual: rk.ResiDual, head: rk.ZeroShotHead):
        super().__init__()
        self.residual, self.head = residual, head

    def training_step(self, batch, _):
        images, labels = batch
        return cross_entropy(self.head(self.residual(images)), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        right = (self.head(self.residual(images)).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.residual.trainable(), lr=0.3)


model, preprocess, tokenizer = rk.load_bundled()
pictures, labels = digit_images()
images = torch.stack([preprocess(picture) for picture in pictures])
train = DataLoader(TensorDataset(images[:400], labels[:400]), batch_size=64, shuffle=True)
val = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=256)

bases = rk.fit_bases(model.visual, train, kinds=("head", "mlp"))
head = rk.ZeroShotHead.from_text(model, tokenizer, NAMES, ["the number {}", "a handwritten {}"])
classifier = LitClassifier(rk.ResiDual(model.visual, bases, rest="all"), head)

lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
# Before is the untouched model: in the anchored form, weights of 1 are the model.
before = trainer.validate(classifier, val, verbose=False)[0]["accuracy"]
trainer.fit(classifier, train)
after = trainer.validate(classifier, val, verbose=False)[0]["accuracy"]
print(f"accuracy {before:.4f} -> {after:.4f} with {len(classifier.residual.weight)} learned numbers")
