"""Pickles as they were published: instances of classes that this project has not, alive only while one is written."""

import pickle
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn
from torchvision import transforms


@contextmanager
def released_code():
    """The modules that the released pickles name, alive only while a file is written."""
    names = ("src", "src.modeling", "open_clip", "open_clip.model", "open_clip.transform")
    saved = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update({name: ModuleType(name) for name in names})

    def member(module, thing):
        thing.__module__, thing.__qualname__ = module, thing.__name__
        setattr(sys.modules[module], thing.__name__, thing)
        return thing

    class ResidualAttentionBlock(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.attn = nn.MultiheadAttention(width, 2)
            self.ln_1 = nn.LayerNorm(width)
            layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
            self.mlp = nn.Sequential(OrderedDict(layers))
            self.ln_2 = nn.LayerNorm(width)

    class QuickGELU(nn.Module):
        pass

    class Transformer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.resblocks = nn.ModuleList(member("open_clip.model", ResidualAttentionBlock)(width) for _ in range(2))

    class VisualTransformer(nn.Module):
        def __init__(self, width, tokens, out):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(width))
            self.positional_embedding = nn.Parameter(torch.randn(tokens, width))
            self.ln_pre = nn.LayerNorm(width)
            self.transformer = Transformer(width)
            self.ln_post = nn.LayerNorm(width)
            self.proj = nn.Parameter(torch.randn(width, out))

    class CLIP(nn.Module):
        def __init__(self, width=8, out=6, context=5):
            super().__init__()
            self.visual = VisualTransformer(width, 5, out)
            self.transformer = Transformer(width)
            self.token_embedding = nn.Embedding(10, width)
            self.positional_embedding = nn.Parameter(torch.randn(context, width))
            self.ln_final = nn.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.randn(width, out))
            self.logit_scale = nn.Parameter(torch.tensor(4.6052))
            self.register_buffer("attn_mask", torch.zeros(context, context), persistent=False)

    class ImageEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = CLIP()
            normalise = transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
            resize = transforms.Resize(4, interpolation=transforms.InterpolationMode.BICUBIC)
            self.train_preprocess = transforms.Compose([transforms.RandomResizedCrop(4), _convert_to_rgb, normalise])
            self.val_preprocess = transforms.Compose([resize, _convert_to_rgb, transforms.ToTensor(), normalise])
            self.cache_dir = None
            delattr(self.model, "transformer")

    class ClassificationHead(nn.Linear):
        def __init__(self, classes=3, out=6):
            super().__init__(out, classes)
            self.normalize = True

    def _convert_to_rgb(image):
        return image.convert("RGB")

    for thing in (ResidualAttentionBlock, QuickGELU, Transformer, VisualTransformer, CLIP):
        member("open_clip.model", thing)
    member("open_clip.transform", _convert_to_rgb)
    member("src.modeling", ImageEncoder)
    member("src.modeling", ClassificationHead)
    try:
        yield sys.modules["src.modeling"]
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(saved)


def write_released(path, name, dump, change=lambda module: None):
    """Write an instance of the released class `name`; its state dict is what a reader should find."""
    with released_code() as modeling:
        module = getattr(modeling, name)()
        state = {key: tensor.detach().clone() for key, tensor in module.state_dict().items()}
        change(module)
        with open(path, "wb") as file:
            dump(module, file)
    return state


def save_legacy(module, file):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the classes' source code
        torch.save(module, file, _use_new_zipfile_serialization=False)


def pickle_3(module, file):
    pickle.dump(module, file, protocol=3)
