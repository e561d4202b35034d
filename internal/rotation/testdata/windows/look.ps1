
function Stop-Step([int]$status, [string]$why) {
  $e = [System.Exception]::new($why)
  $e.Data['status'] = $status
  throw $e
}
function Test-File([string]$path) { return [System.IO.File]::Exists($path) }
function Get-Tree([string]$stage, [string]$path) {
  return [System.IO.Path]::Combine($RUN, $stage, $path.Replace(':', ''))
}
function Get-Parts([string]$item) {
  $i = $item.IndexOf(':')
  return @($item.Substring(0, $i), $item.Substring($i + 1))
}
function Get-Text([string]$path) {
  if (-not (Test-File $path)) { return '' }
  return [System.IO.File]::ReadAllText($path)
}
function Get-BytesHash([byte[]]$bytes) {
  $sha = [System.Security.Cryptography.SHA256]::Create()
  try { return [System.BitConverter]::ToString($sha.ComputeHash($bytes)).Replace('-', '') } finally { $sha.Dispose() }
}

foreach ($item in $argv) {
  $how, $path = Get-Parts $item
  if (-not (Test-File $path)) { $path + '|-|||||||'; continue }
  $kind = 'f'
  $link = ''
  if ([System.IO.File]::GetAttributes($path).HasFlag([System.IO.FileAttributes]::ReparsePoint)) {
    $kind = 'l'
    $link = @((Get-Item -LiteralPath $path -Force).Target) -join ''
  }
  $bytes = [System.IO.File]::ReadAllBytes($path)
  $text = ''
  if ($how -eq 'cert') {
    $text = [regex]::Match([System.Text.Encoding]::ASCII.GetString($bytes), '(?s)-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----').Value + [char]10
  }
  if ($how -eq 'config') {
    $text = [regex]::Replace([System.IO.File]::ReadAllText($path), '(client-key-data|token|password):.*', '$1: ""')
  }
  $content = [System.Convert]::ToBase64String([System.Text.Encoding]::UTF8.GetBytes($text))
  if ($how -eq 'plain') { $content = [System.Convert]::ToBase64String($bytes) }
  $changed = [DateTimeOffset]::new([System.IO.File]::GetLastWriteTimeUtc($path)).ToUnixTimeSeconds()
  $path, $kind, '', '', $link, $changed, (Get-BytesHash $bytes).ToLowerInvariant(), $content, '' -join '|'
}
