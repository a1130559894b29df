//! `tidegate completions SHELL` and `tidegate man [DIR]`: files of the repository, made of the arguments by the tests below
//! and checked in, so that what makes them is no part of the binary.

use std::path::{Path, PathBuf};

use anyhow::Context;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Shell {
    Bash,
    Fish,
    Zsh,
}

pub(super) fn completions(shell: Shell) -> &'static str {
    match shell {
        Shell::Bash => include_str!("../../completions/tidegate.bash"),
        Shell::Fish => include_str!("../../completions/tidegate.fish"),
        Shell::Zsh => include_str!("../../completions/_tidegate"),
    }
}

pub(super) const MAN: [(&str, &str); 2] = [
    ("tidegate.1", include_str!("../../man/tidegate.1")),
    ("gateway.toml.5", include_str!("../../man/gateway.toml.5")),
];

/// Writes the pages into the folder, each into its section as `man -M DIR` wants it; says what to do with them.
pub(super) fn write_man(folder: &Path) -> anyhow::Result<String> {
    for (name, text) in MAN {
        let section = name.rsplit('.').next().unwrap_or("1");
        let place: PathBuf = folder.join(format!("man{section}"));
        std::fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let path = place.join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let folder = folder.display();
    Ok(format!(
        "wrote tidegate(1) and gateway.toml(5)\nnext: man -M {folder} tidegate\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use std::fmt::Write as _;

    /// Without what clap adds by itself.
    fn command() -> clap::Command {
        super::super::Cli::command().disable_help_subcommand(true)
    }

    fn completions_of(shell: clap_complete::Shell) -> String {
        let mut out = Vec::new();
        clap_complete::generate(shell, &mut command(), "tidegate", &mut out);
        String::from_utf8(out).expect("UTF-8")
    }

    /// Sections of a page of clap_mangen.
    fn rendered(render: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> String {
        let mut out = Vec::new();
        render(&mut out).expect("in memory");
        let text = String::from_utf8(out).expect("UTF-8");
        // Each section begins with the two lines that keep apostrophes straight; once is enough.
        text.replace(".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n", "")
    }

    fn man() -> String {
        // --help needs no line at each command.
        let mut main = without_help(command());
        main.build();
        let page = clap_mangen::Man::new(main.clone());
        let mut out = format!(
            ".\\\" Made by the tests from the arguments; see src/cli/pages.rs.\n.ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n\
             .TH tidegate 1 \"\" \"tidegate {}\"\n",
            env!("CARGO_PKG_VERSION")
        );
        out += &rendered(|w| page.render_name_section(w));
        out += &rendered(|w| page.render_synopsis_section(w));
        out += &rendered(|w| page.render_description_section(w));
        out += ".SH COMMANDS\n";
        let mut commands = Vec::new();
        collect(&main, &mut commands);
        for command in commands {
            let name = command.get_bin_name().unwrap_or_default().to_owned();
            let page = clap_mangen::Man::new(command.clone());
            let synopsis = rendered(|w| page.render_synopsis_section(w)).replace(".SH SYNOPSIS\n", "");
            let about = rendered(|w| page.render_description_section(w)).replace(".SH DESCRIPTION\n", "");
            let options = rendered(|w| page.render_options_section(w)).replace(".SH OPTIONS\n", "");
            let _ = write!(out, ".SS \"{name}\"\n{about}.PP\n{synopsis}{options}");
        }
        out += ".SH \"EXIT STATUS\"\n";
        for (code, what) in super::super::EXIT_CODES {
            let _ = write!(out, ".TP\n.B {code}\n{what}.\n");
        }
        out += ".SH ENVIRONMENT\n.TP\n.B TIDEGATE_LOG\nWhat run logs: error, warn, info (the default), debug or trace, also by part: \
                info,tidegate::uplinks=debug.\n.TP\n.B NO_COLOR\nNo colour on a terminal where it is set.\n";
        out += ".SH FILES\n.TP\n.I ./gateway.toml\nThe configuration that is looked for first.\n.TP\n.I /etc/tidegate/gateway.toml\nThe \
                one that is looked for next.\n.TP\n.I DATA_DIR/admin.sock\nThe socket by which commands reach the running gateway.\n";
        out += ".SH \"SEE ALSO\"\n.BR gateway.toml (5)\n";
        out
    }

    fn without_help(command: clap::Command) -> clap::Command {
        command.disable_help_flag(true).mut_subcommands(without_help)
    }

    /// Commands that do something, in their order, those of commands included.
    fn collect<'c>(of: &'c clap::Command, out: &mut Vec<&'c clap::Command>) {
        for command in of.get_subcommands().filter(|c| !c.is_hide_set()) {
            if command.get_subcommands().next().is_none() {
                out.push(command);
            }
            collect(command, out);
        }
    }

    #[test]
    fn completions_and_pages_are_current() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let made = [
            ("completions/tidegate.bash", completions_of(clap_complete::Shell::Bash)),
            ("completions/tidegate.fish", completions_of(clap_complete::Shell::Fish)),
            ("completions/_tidegate", completions_of(clap_complete::Shell::Zsh)),
            ("man/tidegate.1", man()),
        ];
        for (path, made) in made {
            let path = root.join(path);
            if std::env::var("TIDEGATE_GOLDEN").is_ok_and(|v| v == "write") {
                std::fs::create_dir_all(path.parent().expect("it is in a folder")).expect("writable");
                std::fs::write(&path, &made).expect("writable");
            }
            let stands = std::fs::read_to_string(&path).unwrap_or_default();
            let hint = "run TIDEGATE_GOLDEN=write cargo test --lib pages, and look at the difference";
            assert!(stands == made, "{} is not current: {hint}", path.display());
        }
    }
}
