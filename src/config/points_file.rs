//! `points_file = "boiler.csv"`: points of an asset as a table, a row each, with the keys of gateway.toml as columns.
//!
//! The first row names the columns; an empty cell is a key that is not there; lines that begin with `#` are comments.
//! Columns are separated by commas, or by semicolons where the first row has no comma. A row becomes a table of TOML whose
//! values know their place in the file, and is checked by the same code as a point that stands in gateway.toml.

use std::borrow::Cow;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::Fault;
use super::read::Span;

const FILE_BYTES_MAX: u64 = 8 << 20;

/// Keys whose cells are numbers or booleans; all others are texts.
const VALUES: [&str; 13] = [
    "scale",
    "offset",
    "deadband",
    "min",
    "max",
    "length",
    "writable",
    "read_back",
    "safe",
    "active_low",
    "unit_id",
    "frequency",
    "inverted",
];

/// The text of the file, or why there is none.
pub(super) fn text_of(path: &Path) -> Result<String, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is no file".to_owned());
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err("it is larger than 8 MiB".to_owned());
    }
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        format!("it is not UTF-8 text (line {line}): save it as UTF-8")
    })
}

/// A row of the table.
pub(super) struct Row<'i> {
    pub span: Span,
    pub table: DeTable<'i>,
}

/// The rows, and what is wrong with the table as such.
pub(super) fn rows(text: &str) -> (Vec<Row<'_>>, Vec<Fault>) {
    let start = if text.starts_with('\u{feff}') {
        '\u{feff}'.len_utf8()
    } else {
        0
    };
    let body = &text[start..];
    let first = body
        .lines()
        .find(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .unwrap_or_default();
    let delimiter = if !first.contains(',') && first.contains(';') {
        b';'
    } else {
        b','
    };
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .comment(Some(b'#'))
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(body.as_bytes());
    let mut faults = Vec::new();
    let mut columns: Option<Vec<(String, Span)>> = None;
    let mut rows = Vec::new();
    let mut record = csv::StringRecord::new();
    while reader
        .read_record(&mut record)
        .expect("text in memory is UTF-8 and readable")
    {
        let from = start + record.position().map_or(0, |p| usize::try_from(p.byte()).unwrap_or(0));
        let to = start + usize::try_from(reader.position().byte()).unwrap_or(0);
        let span = trimmed(text, from..to);
        let mut cells = Cells {
            text,
            at: span.start,
            end: span.end,
        };
        let Some(columns) = &columns else {
            columns = Some(record.iter().map(|name| (name.to_owned(), cells.next(name))).collect());
            continue;
        };
        if record.iter().all(str::is_empty) {
            continue;
        }
        if record.len() > columns.len() {
            let message = format!(
                "the row has {} cells, there are {} columns",
                record.len(),
                columns.len()
            );
            let hint = "a cell with a comma in it stands in double quotes: \"a, b\"";
            faults.push(Fault::new(span.clone(), message).hint(hint));
            continue;
        }
        let mut table = DeTable::new();
        for (cell, (column, _)) in record.iter().zip(columns) {
            let at = cells.next(cell);
            if !cell.is_empty() && !column.is_empty() {
                let key: Cow<'_, str> = Cow::Owned(column.clone());
                let value = value(column, cell, &text[at.clone()]);
                // A fault of the key is shown at the cell: the row says which point it is.
                table.insert(Spanned::new(at.clone(), key), Spanned::new(at, value));
            }
        }
        rows.push(Row { span, table });
    }
    let columns = columns.unwrap_or_default();
    for (nth, (name, span)) in columns.iter().enumerate() {
        if !name.is_empty() && columns[..nth].iter().any(|(other, _)| other == name) {
            faults.push(Fault::new(span.clone(), format!("there are two columns {name:?}")));
        }
    }
    (rows, faults)
}

/// `typed` is the cell as it stands in the file.
fn value<'i>(column: &str, cell: &str, typed: &'i str) -> DeValue<'i> {
    let text = || DeValue::String(Cow::Owned(cell.to_owned()));
    if !VALUES.contains(&column) {
        return text();
    }
    // As spreadsheets write them, too.
    match cell.to_ascii_lowercase().as_str() {
        "true" => return DeValue::Boolean(true),
        "false" => return DeValue::Boolean(false),
        _ => {}
    }
    match DeValue::parse(typed).map(Spanned::into_inner) {
        Ok(number @ (DeValue::Integer(_) | DeValue::Float(_))) => number,
        _ => text(),
    }
}

fn trimmed(text: &str, span: Span) -> Span {
    let part = &text[span.clone()];
    // Comments and empty lines before the row belong to it as far as the reader is concerned.
    let mut from = span.start;
    for line in part.split_inclusive('\n') {
        if !line.trim().is_empty() && !line.starts_with('#') {
            break;
        }
        from += line.len();
    }
    let from = from.min(span.end);
    from..from + text[from..span.end].trim_end().len()
}

/// Finds the cells of a row in its text, one after the other.
struct Cells<'t> {
    text: &'t str,
    at: usize,
    end: usize,
}

impl Cells<'_> {
    fn next(&mut self, cell: &str) -> Span {
        // A cell with doubled quotes in it is not found as it is; then the row's rest stands for it.
        let found = self.text[self.at..self.end].find(cell).filter(|_| !cell.is_empty());
        let from = self.at + found.unwrap_or(0);
        let to = if found.is_some() {
            from + cell.len()
        } else {
            self.end.max(from)
        };
        if found.is_some() {
            self.at = to;
        }
        from..to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        let (rows, faults) = rows(text);
        let rows = rows.iter().map(|row| {
            let mut cells: Vec<String> = row
                .table
                .iter()
                .map(|(key, value)| {
                    let kind = value.get_ref().type_str();
                    format!("{}:{kind}={}", key.get_ref(), &text[value.span()])
                })
                .collect();
            cells.sort();
            format!("[{}] {}", &text[row.span.clone()], cells.join(" "))
        });
        let faults = faults.iter().map(|f| {
            let span = f.span.clone().expect("of a place");
            format!("! {} at {:?}", f.message, &text[span])
        });
        rows.chain(faults).collect()
    }

    #[test]
    fn a_table_as_spreadsheets_write_it() {
        let text = "\u{feff}# pumps\r\nname;address;scale;writable\r\n\r\np1; holding:0 ;0.1;TRUE\r\n# more\r\np2;coil:3;;\r\n;;;\r\n";
        assert_eq!(
            shown(text),
            [
                "[p1; holding:0 ;0.1;TRUE] address:string=holding:0 name:string=p1 scale:float=0.1 writable:boolean=TRUE",
                "[p2;coil:3;;] address:string=coil:3 name:string=p2",
            ]
        );
    }

    #[test]
    fn texts_stay_texts_and_what_is_no_number_is_said_later() {
        let text = "name,address,scale\n1,2,x\n\"a, \"\"b\"\"\",c,1_000\n";
        assert_eq!(
            shown(text),
            [
                "[1,2,x] address:string=2 name:string=1 scale:string=x",
                "[\"a, \"\"b\"\"\",c,1_000] address:string=c name:string=\"a, \"\"b\"\"\",c,1_000 scale:integer=1_000",
            ]
        );
    }

    #[test]
    fn what_is_wrong_with_the_table_is_said() {
        assert_eq!(
            shown("name,name\na,b,c\n"),
            [
                "! the row has 3 cells, there are 2 columns at \"a,b,c\"",
                "! there are two columns \"name\" at \"name\"",
            ]
        );
        assert!(shown("").is_empty() && shown("name").is_empty() && shown("\n\n#x").is_empty());
    }

    #[test]
    fn no_text_panics() {
        let text = "\u{feff}# ä\nname;address;scale\n\"ü;\";x;1\n\n a;\"\"\"\";0x10\n";
        for (at, _) in text.char_indices() {
            shown(&text[..at]);
            for junk in ["\"", ";", "\n", "ß", "\0", "#"] {
                shown(&format!("{}{junk}{}", &text[..at], &text[at..]));
            }
        }
    }
}
