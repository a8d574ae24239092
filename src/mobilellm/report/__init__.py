"""Pages and tables about runs, data and scores: self-contained HTML, Markdown, CSV, and curves in a
terminal.

    from mobilellm.report.run_page import write_report

    write_report(Path("runs/demo"))      # -> runs/demo/report.html
"""
