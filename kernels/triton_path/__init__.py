"""The Triton kernels. Imported only when a call uses them: `import sdnet` needs torch and einops alone."""
