"""karikomi for PyTorch: measure and apply on modules, optimizers and their gradients."""

from karikomi.torch.attachment.attaching import attach
from karikomi.torch.attachment.handle import Handle
from karikomi.torch.bounding.attention_logits import note_logits, watch_logits
from karikomi.torch.bounding.in_place import bound_
from karikomi.torch.clipping.in_place import clip_
from karikomi.torch.clipping.per_example import clip_examples
from karikomi.torch.equalization.batch_norm_folding import fold_batch_norms_
from karikomi.torch.equalization.bias_correction import correct_biases_
from karikomi.torch.equalization.cross_layer import equalize_
from karikomi.torch.equalization.outlier_smoothing import smooth_
from karikomi.torch.modules.arrays import as_array, fill_, notes_of, to_arrays, to_stored
from karikomi.torch.modules.attention import declare_attention
from karikomi.torch.modules.resizing import resize_
from karikomi.torch.onnx_export.latency import measure_onnx
from karikomi.torch.onnx_export.to_file import export_onnx
from karikomi.torch.pruning.importances import scores
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.pruning.sensitivity_curves import sensitivity
from karikomi.torch.quantization.in_place import quantize_
from karikomi.torch.quantization.while_training import QuantizedTraining, quantized_training
from karikomi.torch.reconstruction.refit import reconstruct_
from karikomi.torch.recovery.batch_norm import recalibrate_
from karikomi.torch.recovery.fine_tune import recover_
from karikomi.torch.shrinking.smaller_copy import shrink
from karikomi.torch.sparse_training.penalties import penalty
from karikomi.torch.tasks.runner import runner_for
from karikomi.torch.tasks.trained import copies_of, examples

__all__ = [
    "Handle",
    "Masks",
    "QuantizedTraining",
    "as_array",
    "attach",
    "bound_",
    "clip_",
    "clip_examples",
    "correct_biases_",
    "declare_attention",
    "equalize_",
    "export_onnx",
    "copies_of",
    "declare_attention",
    "examples",
    "fill_",
    "fold_batch_norms_",
    "measure_onnx",
    "note_logits",
    "notes_of",
    "penalty",
    "prune_",
    "quantize_",
    "quantized_training",
    "recover_",
    "recalibrate_",
    "reconstruct_",
    "resize_",
    "runner_for",
    "scores",
    "sensitivity",
    "shrink",
    "smooth_",
    "to_arrays",
    "to_stored",
    "watch_logits",
]
