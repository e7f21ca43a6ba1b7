"""What is run on GPUs to show that nothing is lost, mixed up or waited for for ever: `python -m tests.proof --help`.

Each part runs on CPU ranks too, with small counts, so that its logic is tested where no GPU is.
"""
