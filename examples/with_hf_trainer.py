"""Hugging Face's Trainer on a transformers CLIPModel: ResiDual stands in it, its weights alone are trained.

The model is tiny and random, so that this runs offline. With CLIPModel.from_pretrained, images and captions
come from its CLIPProcessor, and the rest stays as it is.
"""

from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

import residual_kernels as rk
from residual_kernels.demo import digit_images

torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
factor = {"initializer_factor": 4.0}  # of random weights
text = size | factor | {"vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
vision = size | factor | {"image_size": 32, "patch_size": 8}
model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
captions = {"input_ids": torch.tensor([[1, 3 + digit, 2] for digit in range(10)])}  # a word for each digit

_, preprocess, _ = rk.load_bundled()
pictures, labels = digit_images()
images = torch.stack([preprocess(picture) for picture in pictures])
train, val = TensorDataset(images[:600], labels[:600]), TensorDataset(images[1400:], labels[1400:])


def collate(rows):
    return {"pixel_values": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


class ZeroShotTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"], **captions)
        loss = torch.nn.functional.cross_entropy(outputs.logits_per_image, inputs["labels"])
        return (loss, {"logits": outputs.logits_per_image}) if return_outputs else loss


def accuracy(seen):
    return {"accuracy": (np.argmax(seen.predictions, 1) == seen.label_ids).mean()}


own: dict[str, Any] = {"remove_unused_columns": False, "label_names": ["labels"], "report_to": "none"}
arguments = TrainingArguments(
    "runs", num_train_epochs=6, learning_rate=0.5, per_device_train_batch_size=64, **own
)
trainer = ZeroShotTrainer(model, arguments, collate, train, val, compute_metrics=accuracy)
before = trainer.evaluate()["eval_accuracy"]  # of the untouched model
bases = rk.fit_bases(model, images[:600].split(100), kinds=("head", "mlp"))
model.requires_grad_(False)
handle = rk.attach(model, bases, rest="sum")  # get_image_features, image_embeds and logits now come from y
trainer.train()
after = trainer.evaluate()["eval_accuracy"]
print(f"accuracy {before:.4f} -> {after:.4f} with {len(handle.residual.weight)} learned numbers")
rk.save_adapter(handle.residual, "digits-adapter")
handle.detach()
