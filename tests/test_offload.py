"""Nets come to the device one at a time. (No GPU is needed: who comes and goes is told by stand-ins.)"""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image

import ldm
from ldm import conditioning, pipeline, run
from ldm.offload import at_work

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NETS = ("text_encoder", "text_encoder_2", "unet", "vae")


class Net:
    there: ClassVar[set["Net"]] = set()  # on the device

    def __init__(self):
        self.device, self.moves = CPU, 0

    def parameters(self):
        yield SimpleNamespace(device=self.device)

    def to(self, device):
        self.device, self.moves = torch.device(device), self.moves + 1
        (Net.there.add if self.device == CUDA else Net.there.discard)(self)
        assert len(Net.there) <= 1


def test_one_at_a_time():
    pipe = SimpleNamespace(offloaded=CUDA, **{name: Net() for name in NETS})
    pipe.text_encoder_2 = None
    nets = [pipe.text_encoder, pipe.unet, pipe.unet, pipe.vae, pipe.text_encoder]
    for net in nets:
        at_work(pipe, net)
        assert {net} == Net.there
    assert [net.moves for net in (pipe.text_encoder, pipe.unet, pipe.vae)] == [3, 2, 2]


def test_nothing_moves_unless_asked():
    pipe = SimpleNamespace(offloaded=None, **{name: Net() for name in NETS})
    at_work(pipe, pipe.unet)
    assert pipe.unet.moves == 0


def test_each_net_is_called_for_before_it_computes(monkeypatch):
    pipe, order = ldm.Pipeline.from_pretrained(device="cpu"), []
    for module in (conditioning, pipeline, run):
        monkeypatch.setattr(module, "at_work", lambda pipe, net: order.append(("asked", net)))
    for name in ("text_encoder", "unet"):
        getattr(pipe, name).register_forward_pre_hook(lambda net, inputs: order.append(("computes", net)))
    for net in (pipe.vae.encoder, pipe.vae.decoder):
        net.register_forward_pre_hook(lambda net, inputs: order.append(("computes", pipe.vae)))
    pipe("a red heart", image=Image.new("RGB", (64, 64)), strength=0.5, steps=4, progress=False)
    asked = None
    for what, net in order:
        assert what == "asked" or net is asked
        asked = net
    computed = [net for what, net in order if what == "computes"]
    assert computed == [pipe.vae, *[pipe.text_encoder] * 2, *[pipe.unet] * 2, pipe.vae]


def test_the_device_is_where_nets_come_to():
    pipe = ldm.Pipeline.from_pretrained(device="cpu")
    assert pipe.device == CPU
    pipe.offload("cuda")
    assert pipe.device == CUDA
    pipe = ldm.Pipeline.from_pretrained(device="cpu")
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="load the pipeline with device='cpu'"):
        pipe.offload()
