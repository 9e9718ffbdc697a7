# /// script
# requires-python = ">=3.10"
# dependencies = ["zo-hf[demo]"]
# ///
"""Fine-tune OPT-125M on SST-2 with forward passes only, at the memory of inference.

    accelerate launch recipes/opt_sst2.py                  from the hub; without a hub, the embedded default
    accelerate launch recipes/opt_sst2.py --offline        the embedded model and sentences
    python recipes/opt_sst2.py --help                      all options, including those of the trainer

As in MeZO, the prompt is "{text} It was" and the label words are " terrible" and " great", with 1,000 training
sentences. The loss is the cross entropy among these words; --loss vocabulary takes it over all words. Any causal
language model, any sentences and any prompt can be used instead:

    accelerate launch recipes/opt_sst2.py --model_name_or_path MODEL --train_file reviews.csv --text_column review \\
        --template "Review: {text} Sentiment:" --verbalizers " negative" " positive"

The steps of the job are in zo_hf/tasks/sentiment_job.py and its defaults in zo_hf/tasks/job_arguments.py.
`zo-hf train` is the same job.
"""

from zo_hf.tasks.sentiment_job import main

if __name__ == "__main__":
    main()
