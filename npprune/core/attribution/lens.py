"""The logit lens: what a neuron's output says to the classifier, if nothing came behind it.

A neuron adds a multiple of its column of `fc2` to the stream. The last norm and the classifier
turn that direction into logits: here by their derivative at final streams of real images, so
that the norm's scale is that of images and any norm, pooling or classifier will do.

Letters: n images, t tokens, d width, c classes.

Source: for the idea, nostalgebraist, "interpreting GPT: the logit lens" (2020); Geva et al.,
"Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the Vocabulary Space"
(EMNLP 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npprune.core.view import Scope, VitView, frozen

NUMBERS = 2**24  # of the streams that are differentiated at once


def pushes(view: VitView, streams: Tensor, *, scope: Scope) -> Tensor:
    """Change of the logits [c, d] for each unit step of the scope's tokens; less its mean over
    classes, which the softmax does not see.

    Args:
        streams: [n, t, d], what the last block gives for some images; the mean over them counts.
    """
    tokens = view.tokens(scope)
    streams = streams[:, : view.tokens_read]  # nothing else moves the logits
    n, t, d = streams.shape
    with torch.no_grad():
        classes = view.head(streams[:1]).shape[1]
    size = max(1, NUMBERS // streams.numel())
    rows = []
    with frozen(view.model):
        for chosen in torch.arange(classes, device=streams.device).split(size):
            k = len(chosen)
            x = streams.detach()[:, None].expand(n, k, t, d).reshape(n * k, t, d)
            x = x.clone().requires_grad_()
            own = view.head(x).gather(1, chosen.repeat(n)[:, None]).sum()
            (gradient,) = torch.autograd.grad(own, x)
            rows.append(gradient[:, tokens].sum(1).view(n, k, d).mean(0))
    found = torch.cat(rows)
    return found - found.mean(0)
