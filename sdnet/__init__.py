"""Convolutional sparse-coding networks: layers, models, official checkpoints, diagnostics and robust inference."""

from sdnet import robustness
from sdnet.attachment import attach
from sdnet.conversion import Conversion, convert
from sdnet.deployment import Exported, export
from sdnet.diagnostics import LayerDiagnostics, Recording, diagnose, record
from sdnet.inversion import Inversion, invert, invert_layers
from sdnet.layers import CSCConv2d
from sdnet.linear import CSCLinear
from sdnet.models import SDNet, create_model, list_models
from sdnet.official import load_official_checkpoint, load_official_model, save_official_checkpoint
from sdnet.pretrained import list_pretrained
from sdnet.qualify import Qualification, qualify
from sdnet.settings import check_lambda, set_impl, set_lambda
from sdnet.step_size import converge_power_vectors, project, refresh_step_size, step_margins
from sdnet.weights import load_model, read_weights, save_model

__version__ = "0.1.0"

__all__ = [
    "CSCConv2d",
    "CSCLinear",
    "Conversion",
    "Exported",
    "Inversion",
    "LayerDiagnostics",
    "Qualification",
    "Recording",
    "SDNet",
    "attach",
    "check_lambda",
    "converge_power_vectors",
    "convert",
    "create_model",
    "diagnose",
    "export",
    "invert",
    "invert_layers",
    "list_models",
    "list_pretrained",
    "load_model",
    "load_official_checkpoint",
    "load_official_model",
    "project",
    "qualify",
    "read_weights",
    "record",
    "refresh_step_size",
    "robustness",
    "save_model",
    "save_official_checkpoint",
    "set_impl",
    "set_lambda",
    "step_margins",
]
