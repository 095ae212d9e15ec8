"""The fused loss: `qtarget_loss` and its kernels, from hidden states and head to the loss and its gradient.

May import `theory`, but no preset: kernels never learn a method's name. Of other packages, torch and Triton alone.
"""
