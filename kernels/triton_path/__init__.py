"""The Triton kernels. Imported only when a call runs on them: `import sdnet` needs torch and einops alone.

`loop` is the operator's forward and backward pass. `paths` chooses one of two paths for a layer and says what a path
provides; `tiles` chooses how its kernels cut the work.

    fused/          the convolutions themselves: A', A and all that surrounds them
    cudnn.py        cuDNN's convolutions, with the kernels of `pointwise` between them
    correlation/    the gradient of the dictionary, on both paths
    step_sizes.py   the power iterations of all layers of a network

`candidates` lists other tiles that a measurement may choose, `grids` counts the programs of a launch, and `launch`
launches a kernel with little work for the host.

A kernel's folder reads from `kernels` (the formula, the epilogue) to `forms` (how operands are read). `layer`,
`geometry` and `hardware` hold what launchers and kernels know of a layer and of its device.
"""
