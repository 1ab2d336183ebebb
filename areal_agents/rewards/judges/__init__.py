"""Other models as judges: of one answer, of an answer beside a reference, of a group's answers.

question, answer ─▶ slot (sealed) ─▶ a prompt for each judge ─▶ panel ─▶ one strict line each ─▶ aggregate ─▶ Verdict
                                                                  ├─ cache, budget, concurrency, deadline
                                                                  └─ a judge that fails is counted; too few: InfraError
"""
