//! The input of the files bench: deterministic, the same bytes on every machine.
//!
//! What ML platforms keep: logs, JSON events and CSV, incompressible archives, arrays of rounded
//! floats, many small files, and copies. Kept here, so that benches and tests share it.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use fastrand::Rng;

/// Sizes at scale 1, in bytes.
const TEXT_BYTES: u64 = 600_000_000;
const RANDOM_BYTES: u64 = 600_000_000;
const ARRAY_BYTES: u64 = 400_000_000;
const SMALL_FILES: u64 = 20_000;
/// Text is spread over this many files; the first four are copied, which makes 200 MB.
const TEXT_FILES: u64 = 12;
const COPIED_FILES: u64 = 4;

const WORDS: &[&str] = &[
    "model",
    "epoch",
    "loss",
    "batch",
    "worker",
    "scheduler",
    "request",
    "tenant",
    "shard",
    "replica",
    "commit",
    "queue",
    "feature",
    "vector",
    "index",
    "upload",
    "token",
    "latency",
    "retry",
    "cache",
    "gradient",
    "checkpoint",
    "dataset",
    "inference",
    "pipeline",
    "artifact",
    "registry",
    "tensor",
    "namespace",
    "offset",
];
const LEVELS: &[&str] = &["INFO", "INFO", "INFO", "DEBUG", "WARN", "ERROR"];

/// Writes the whole input below `folder`; `scale` 1.0 makes 2 GB in about 20,050 files.
pub fn generate(folder: &Path, scale: f64) -> io::Result<()> {
    let sized = |bytes: u64| (bytes as f64 * scale) as u64;
    let text_bytes = sized(TEXT_BYTES) / TEXT_FILES;
    for number in 0..TEXT_FILES {
        let path = folder.join(text_name(number));
        match number % 3 {
            0 => lines(&path, text_bytes, number, log_line)?,
            1 => lines(&path, text_bytes, number, json_line)?,
            _ => lines(&path, text_bytes, number, csv_line)?,
        }
    }
    for number in 0..4 {
        random(&folder.join(format!("archives/archive-{number}.bin")), sized(RANDOM_BYTES) / 4, number)?;
        array(&folder.join(format!("arrays/embedding-{number}.f32")), sized(ARRAY_BYTES) / 4, number)?;
    }
    for number in 0..COPIED_FILES {
        let copy = folder.join("copies").join(format!("copy-{number}.txt"));
        create_parent(&copy)?;
        std::fs::copy(folder.join(text_name(number)), copy)?;
    }
    small(&folder.join("small"), sized(SMALL_FILES), 1024, 16 * 1024, 100)
}

/// Writes `count` files of 1 to 4 KB below `folder`, 1,000 in a directory.
pub fn small_files(folder: &Path, count: u64) -> io::Result<()> {
    small(folder, count, 1024, 4096, 1000)
}

/// Rewrites about 1 % of the bytes of the big files (19 MB at scale 1): runs of 256 KB in place, at
/// places that depend on `round`. Sizes stay.
pub fn change(folder: &Path, round: u64) -> io::Result<()> {
    const RUN_BYTES: u64 = 256 * 1024;
    let mut rng = Rng::with_seed(0x00c4_a49e ^ round);
    let mut big = Vec::new();
    for part in ["text", "archives", "arrays", "copies"] {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(folder.join(part))?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>()?;
        paths.sort();
        big.extend(paths);
    }
    let mut run = vec![0; RUN_BYTES as usize];
    for path in big {
        let file = File::options().read(true).write(true).open(&path)?;
        let size = file.metadata()?.len();
        let runs = (size / 100 / RUN_BYTES).max(1);
        for _ in 0..runs {
            let length = RUN_BYTES.min(size);
            let from = rng.u64(0..=size - length);
            let to = rng.u64(0..=size - length);
            // Content of the same kind from elsewhere in the file, with a fresh mark every 4 KiB.
            file.read_exact_at(&mut run[..length as usize], from)?;
            for block in run[..length as usize].chunks_mut(4096) {
                let mark = rng.u64(..).to_le_bytes();
                let end = block.len().min(8);
                block[..end].copy_from_slice(&mark[..end]);
            }
            file.write_all_at(&run[..length as usize], to)?;
        }
    }
    Ok(())
}

fn text_name(number: u64) -> String {
    let kind = ["log", "jsonl", "csv"][(number % 3) as usize];
    format!("text/part-{number:02}.{kind}")
}

fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

fn lines(
    path: &Path,
    bytes: u64,
    seed: u64,
    line: fn(&mut Rng, u64, &mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    create_parent(path)?;
    let mut rng = Rng::with_seed(0x7e47 + seed);
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut buffer = Vec::with_capacity(512);
    let (mut written, mut number) = (0, 0);
    while written < bytes {
        buffer.clear();
        line(&mut rng, number, &mut buffer)?;
        writer.write_all(&buffer)?;
        written += buffer.len() as u64;
        number += 1;
    }
    writer.flush()
}

fn word(rng: &mut Rng) -> &'static str {
    WORDS[rng.usize(..WORDS.len())]
}

fn clock(number: u64, rng: &mut Rng) -> (u64, u64, u64, u64) {
    let seconds = number / 40;
    (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60, rng.u64(0..1_000_000))
}

fn log_line(rng: &mut Rng, number: u64, out: &mut Vec<u8>) -> io::Result<()> {
    let (hour, minute, second, micro) = clock(number, rng);
    let level = LEVELS[rng.usize(..LEVELS.len())];
    let host = rng.u32(0..48);
    write!(
        out,
        "2026-11-{:02}T{hour:02}:{minute:02}:{second:02}.{micro:06}Z {level:<5} node-{host:02} ",
        1 + number % 28
    )?;
    write!(out, "{}.{} {} {} ", word(rng), word(rng), word(rng), word(rng))?;
    writeln!(out, "request_id={:016x} took_ms={} bytes={}", rng.u64(..), rng.u32(0..2000), rng.u32(..1_000_000))
}

fn json_line(rng: &mut Rng, number: u64, out: &mut Vec<u8>) -> io::Result<()> {
    let (user, session) = (rng.u32(0..5000), rng.u64(..));
    let score = f64::from(rng.u32(0..10_000)) / 10_000.0;
    write!(out, r#"{{"id":{number},"user":"user-{user:05}","session":"{session:016x}","event":"{}","#, word(rng))?;
    write!(out, r#""score":{score:.4},"tags":["{}","{}"],"#, word(rng), word(rng))?;
    writeln!(out, r#""payload":{{"{}":{},"{}":"{}"}}}}"#, word(rng), rng.u32(0..1000), word(rng), word(rng))
}

fn csv_line(rng: &mut Rng, number: u64, out: &mut Vec<u8>) -> io::Result<()> {
    let (hour, minute, second, _) = clock(number, rng);
    write!(out, "{number},2026-11-21 {hour:02}:{minute:02}:{second:02},{},{}", word(rng), rng.u32(0..300))?;
    for _ in 0..6 {
        write!(out, ",{:.3}", f64::from(rng.u32(0..1_000_000)) / 1000.0)?;
    }
    writeln!(out, ",{}", rng.bool())
}

fn random(path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    create_parent(path)?;
    let mut rng = Rng::with_seed(0xa4c1 + seed);
    let mut writer = File::create(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        rng.fill(&mut buffer);
        let length = left.min(buffer.len() as u64);
        writer.write_all(&buffer[..length as usize])?;
        left -= length;
    }
    Ok(())
}

/// Values between -1 and 1, rounded to 1/1024: the low bits of each float are zero.
fn array(path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    create_parent(path)?;
    let mut rng = Rng::with_seed(0xf32 + seed);
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path)?);
    for _ in 0..bytes / 4 {
        // The sum of four draws is bell-shaped, as weights are.
        let sum: i32 = (0..4).map(|_| rng.i32(-256..=256)).sum();
        writer.write_all(&(sum as f32 / 1024.0).to_le_bytes())?;
    }
    writer.flush()
}

fn small(folder: &Path, count: u64, bytes_min: u64, bytes_max: u64, per_folder: u64) -> io::Result<()> {
    let mut rng = Rng::with_seed(0x5a11);
    let mut text = Vec::new();
    for number in 0..count {
        if number % per_folder == 0 {
            std::fs::create_dir_all(folder.join(format!("{:05}", number / per_folder)))?;
        }
        text.clear();
        let bytes = rng.u64(bytes_min..=bytes_max) as usize;
        while text.len() < bytes {
            json_line(&mut rng, number, &mut text)?;
        }
        text.truncate(bytes);
        std::fs::write(folder.join(format!("{:05}/item-{number:07}.json", number / per_folder)), &text)?;
    }
    Ok(())
}

/// A reader over the concatenation of all big files, for benches of one stream.
pub fn stream(folder: &Path) -> io::Result<Box<dyn Read + Send>> {
    let mut all: Box<dyn Read + Send> = Box::new(io::empty());
    for part in ["text", "archives", "arrays", "copies"] {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(folder.join(part))?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<_>>()?;
        paths.sort();
        for path in paths {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(0))?;
            all = Box::new(all.chain(file));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_every_time_and_changes_keep_sizes() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        generate(&a, 0.002).expect("generates");
        generate(&b, 0.002).expect("generates");
        let read = |root: &Path| std::fs::read(root.join("text/part-01.jsonl")).expect("is there");
        assert_eq!(read(&a), read(&b));
        let before = read(&a);
        change(&a, 1).expect("changes");
        assert_eq!(read(&a).len(), before.len());
        assert_ne!(read(&a), before);
    }
}
