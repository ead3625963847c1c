"""An operator that the compiler does not know, as a Triton kernel would be: its rules are those of a matrix product."""

import torch
from torch import Tensor, nn

import s2ft_compile as s2ft
from s2ft_compile.rules import axis_rule, slice_rule

axis_rule("example::product", like="aten.mm")  # finds the couplings through it
slice_rule("example::product", like="aten.mm")  # its weight gradients are computed for what trains alone


@torch.library.custom_op("example::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


product.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
product.register_autograd(
    lambda ctx, dY: (product(dY, ctx.saved_tensors[1].T), product(ctx.saved_tensors[0].T, dY)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class FeedForward(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 64):
        super().__init__()
        self.up = nn.Parameter(torch.randn(width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + product(torch.relu(product(x, self.up)), self.down)


def main() -> nn.Module:
    model, x = FeedForward(), torch.randn(8, 16)
    print(s2ft.prepare(model, (x,), s2ft.S2FTConfig(targets={"ffn.out": 4})))
    net = torch.compile(model, backend="s2ft", options={"inner": "aot_eager"})
    net(x).square().sum().backward()
    return model


if __name__ == "__main__":
    main()
