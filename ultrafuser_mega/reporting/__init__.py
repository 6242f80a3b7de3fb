"""What a person sees of a run: the live progress, the tables, the files, the plots and the token view.

Everything here is fed with plain data (numbers, strings, arrays) by one rank and knows nothing of
models, process groups or Megatron. One subject per module:

    records      what is recorded: StepRecord, EvalRecord; metrics.jsonl, TensorBoard, summary.json
    console      TrainConsole: the live display in a terminal, plain lines in a log
    tables       the result tables, for the terminal and for Markdown
    plots        PNG: loss curves, gate heat map (the paper's figure 6), gate weights over training
    token_view   HTML: every response token coloured by its leading specialist (figures 8 and 9)
    palette      the colours they share
"""
