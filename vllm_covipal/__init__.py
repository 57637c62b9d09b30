"""CoViPAL for vLLM: visual tokens pruned before the language model. Importing changes nothing."""
