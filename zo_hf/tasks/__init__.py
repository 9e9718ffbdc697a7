"""Classification as next-word prediction: data, prompts, scores, and the job that combines them."""
