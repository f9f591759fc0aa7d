"""The sources that several claims share."""

FLASH1 = "Dao et al. 2022, FlashAttention, arXiv 2205.14135"
FLASH2 = "Dao 2023, FlashAttention-2, arXiv 2307.08691"
FLASH3 = "Shah et al. 2024, FlashAttention-3, arXiv 2407.08608"
SAHA_YE = "Saha & Ye 2024, arXiv 2402.07443"
LINEAR = "Katharopoulos et al. 2020, linear attention, arXiv 2006.16236"
LIGHTNING2 = "Qin et al. 2024, Lightning Attention-2, arXiv 2401.04658"
MISTRAL = "Jiang et al. 2023, Mistral 7B, arXiv 2310.06825"
LONGFORMER = "Beltagy et al. 2020, Longformer, arXiv 2004.05150"
PAGED_ATTENTION = "Kwon et al. 2023, PagedAttention, arXiv 2309.06180"
ONLINE_SOFTMAX = "Milakov & Gimelshein 2018, arXiv 1805.02867"

# Popular articles, by title; all in Chinese.
OVERVIEW = "popular article: Attention 注意力机制"
VERSUS = "popular article: Attention vs Flash Attention"
ADVANCED = "popular article: 注意力机制进阶"
MULTI_HEAD = "popular article: 什么是 Multi-Head Attention?"
IN_LLMS = "popular article: LLM中的Attention实现及优化"
