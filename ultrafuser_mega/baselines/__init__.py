"""What one would do instead of fusing, with the same specialists and data: models to compare a fused model with.

Each writes a Hugging Face folder or a release, as ``ultrafuser baseline`` names them:

    merging, mergekit      weights of specialists of equal shapes put together, no training
    derived                configurations of runs: one specialist further tuned, the fused structure over one base
    btx, fusechat          experts as a mixture of feed-forward parts; pairwise distillation into one, then merged

The rules of mixing that need no weights of their own belong to evaluation.
"""
