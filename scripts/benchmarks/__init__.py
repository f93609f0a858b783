"""Programs that measure, and what they share.

benchmark.py         what each way of training costs                     shapes, row_lengths, training
answer_speed.py      answers a second in each way of generating          answers
encoding_speed.py    rows a second, read and encoded
profile_step.py      where the time of a training step on a CPU goes     step_parts
check_estimate.py    the memory that --dry_run tells, and what is used   step_memory
check_gpu.py         right and fast on a GPU?                            gpu
plain_trainer.py     Trainer and PEFT alone, for compare_tools.py
"""
