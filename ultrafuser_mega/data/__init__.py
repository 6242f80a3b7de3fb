"""From instruction files to microbatches.

    files -> readers -> columns, conversation -> chat_format, templates, tokenizer
        -> align -> build -> store                                                      (ultrafuser prepare)
    store -> sampler -> batches -> collate                                              (every training step)

``prepare.prepare_store`` writes a token store once; ``store.TokenStore`` reads it; ``batches`` gives each
data-parallel rank its microbatches. Nothing here knows the configuration tree or torch.distributed.
"""
