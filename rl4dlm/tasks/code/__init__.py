"""Tasks whose answers are programs, judged by running them in `rl4dlm.grading.sandbox`."""
